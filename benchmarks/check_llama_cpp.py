"""Does llama.cpp compute from our GGUF files what we compute, and do we read what its tools write?

For each type the model folder is exported, served with llama-server in fp32 attention, and compared with our own
forward pass on the same numbers. `--source` adds llama.cpp's own converter, `--quantize` a Q4_K_M file made by
llama-quantize from our bf16 export. Needs a build of llama.cpp; the converter also its source tree (the source package
of llama-cpp-python holds one) and the package sentencepiece.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _pair import print_json

import torch
from _llama_server import Server

from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.gguf import export_gguf, import_gguf
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.model import Batch, CausalLM
from qnext.text.gguf import vocabulary_keys
from qnext.text.tokenizer import Tokenizer

PROMPTS = (
    "def read_lines(path, encoding=None):\n",
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\n",
    "    if not isinstance(value, int):\n        raise",
)
# Largest allowed KL divergence, in nats: fp32 differs by the order of sums, the others by rounded activations.
MAX_KL = {"f32": 1e-9, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2, "q4_0": 2e-2, "q4_k_m": 2e-2}
_SERVER_OPTIONS = ["-t", "2", "-c", "1024", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
# The converter knows tokenizers by a hash of what they do; ours are Qwen2's with another vocabulary.
_CONVERT = """
import runpy, sys
source = sys.argv.pop(1)
sys.path[:0] = [source, source + "/gguf-py"]
import conversion.base as base
for value in vars(base).values():
    if isinstance(value, type) and hasattr(value, "get_vocab_base_pre"):
        value.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def compare(server: Server, model: CausalLM, tokenizer: Tokenizer, *, num_tokens: int) -> dict[str, Any]:
    """Worst prompt: KL(ours, theirs) of the next token; share of prompts with equal greedy tokens, and tokenisation."""
    engine = Engine.of(
        model, EngineConfig(max_num_seqs=1, max_model_len=min(512, model.config.max_position_embeddings))
    )
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    divergences, same_tokens, same_prompts = [], [], []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        # The probabilities are those before the bias, which makes the answer whole text: without, none are sent.
        answer = server.complete(ids, 1, n_probs=model.config.vocab_size, logit_bias=[[ids[0], 1e6]])
        theirs = torch.full((model.config.vocab_size,), -100.0, dtype=torch.float64)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            theirs[entry["id"]] = entry["logprob"]
        theirs = theirs.log_softmax(0)
        with torch.no_grad():
            hidden_TD = model(Batch.from_lengths(torch.tensor(ids), [len(ids)])).hidden_TD
            ours = model.logits(hidden_TD[-1:])[0].double().log_softmax(0)
        divergences.append(float((ours.exp() * (ours - theirs)).sum()))
        greedy = server.complete(ids, num_tokens, return_tokens=True)["tokens"]
        # llama.cpp ends at tokens that it knows by name to end a text; ours goes on.
        same_tokens.append(list(engine.generate([ids], params)[0].output_ids[: len(greedy)]) == greedy)
        same_prompts.append(server.post("/tokenize", content=prompt)["tokens"] == ids)
    return {
        "max_kl": max(divergences),
        "same_greedy": sum(same_tokens) / len(PROMPTS),
        "tokenisation": all(same_prompts),
    }


def serve_and_compare(options: argparse.Namespace, gguf: Path, work: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """llama.cpp on a file against us on the same file, imported in fp32.

    llama.cpp rounds activations to the weights' type before it multiplies (bf16, or 8 bits in groups of 32 for
    quantised weights); fp32 files have no such noise.
    """
    folder = work / f"{gguf.stem}-imported"
    import_gguf(gguf, folder, dtype=torch.float32, dequantize=True)
    model = load_model(folder)
    server = Server(options.server, gguf, _SERVER_OPTIONS, port=options.port)
    try:
        return compare(server, model, tokenizer, num_tokens=options.tokens)
    finally:
        server.close()


def largest_difference(folder: Path, other: Path) -> float:
    """Largest difference of any number in two folders with the same tensors."""
    worst = 0.0
    with TensorFiles(folder) as ours, TensorFiles(other) as theirs:
        assert ours.tensors.keys() == theirs.tensors.keys(), ours.tensors.keys() ^ theirs.tensors.keys()
        for name in ours.tensors:
            worst = max(worst, float((ours.read(name).double() - theirs.read(name).double()).abs().max()))
    return worst


def check_converter(options: argparse.Namespace, work: Path) -> float:
    """The folder, through llama.cpp's converter and our import, against itself, tensor by tensor."""
    gguf = work / "converter.gguf"
    command = [sys.executable, "-c", _CONVERT, str(options.source), str(options.model), "--outtype", "f32"]
    subprocess.run([*command, "--outfile", str(gguf)], check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    import_gguf(gguf, work / "converter-imported")
    return largest_difference(options.model, work / "converter-imported")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--server", type=Path, required=True, help="llama-server of a build of llama.cpp")
    parser.add_argument("--types", nargs="+", default=["f32", "bf16", "q8_0", "q4_0"], help="types of our export")
    parser.add_argument("--source", type=Path, help="source tree of llama.cpp, for its converter")
    parser.add_argument("--quantize", type=Path, help="llama-quantize of the build")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--port", type=int, default=18089)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_folder(options.model)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        layout = read_layout(options.model)
        keys = vocabulary_keys(options.model, num_rows=layout.config.vocab_size)
        for kind in options.types:
            gguf = work / f"{kind}.gguf"
            export_gguf(layout, gguf, kind=kind, tokenizer_keys=keys)
            results[kind] = serve_and_compare(options, gguf, work, tokenizer)
        if options.quantize is not None:
            export_gguf(options.model, work / "source.gguf", kind="bf16", tokenizer_keys=keys)
            gguf = work / "q4_k_m.gguf"
            command = [str(options.quantize), str(work / "source.gguf"), str(gguf), "Q4_K_M", str(os.cpu_count())]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            results["q4_k_m"] = serve_and_compare(options, gguf, work, tokenizer)
        for kind, result in results.items():
            result["agree"] = result["max_kl"] <= MAX_KL[kind] and result["tokenisation"]
            print(f"{kind:<8} KL {result['max_kl']:.2e}  greedy equal {result['same_greedy']:.0%}  {result['agree']}")
        agree = all(result["agree"] for result in results.values())
        document = {"benchmark": "check_llama_cpp", "tokens": options.tokens, "results": results}
        if options.source is not None:
            document["converter_difference"] = check_converter(options, work)
            agree &= document["converter_difference"] < 1e-6
            print(f"llama.cpp's converter and our import: largest difference {document['converter_difference']:.1e}")
    print_json({**document, "agree": agree})
    sys.exit(not agree)


if __name__ == "__main__":
    main()
