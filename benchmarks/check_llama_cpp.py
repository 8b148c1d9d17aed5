"""Does llama.cpp read our exported folders and continue prompts as we do?

Converts a model folder with llama.cpp's own converter, serves it with llama-server in fp32 and compares greedy
continuations token for token, and the tokenisation of the prompts. Needs a source tree and a build of llama.cpp (the
source package of llama-cpp-python holds the tree), and the Python packages gguf and sentencepiece.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from _pair import print_json

from qnext.checkpoint import load_model
from qnext.engine import Engine, SamplingParams
from qnext.text.tokenizer import Tokenizer

PROMPTS = (
    "def read_lines(path, encoding=None):\n",
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\n",
    "    if not isinstance(value, int):\n        raise",
)
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


class Server:
    """llama-server on a loopback port."""

    def __init__(self, binary: Path, gguf: Path, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        options = ["-m", str(gguf), "-t", "2", "-c", "1024", "--port", str(port), "--no-webui"]
        options += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]
        self._process = subprocess.Popen([str(binary), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                urllib.request.urlopen(self._url + "/health")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise RuntimeError("llama-server did not come up")

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--source", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--server", type=Path, required=True, help="its llama-server")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--port", type=int, default=18089)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_folder(options.model)
    engine = Engine(load_model(options.model, dtype=torch.float32), max_num_seqs=1, max_model_len=1024)
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        command = [sys.executable, "-c", _CONVERT, str(options.source), str(options.model), "--outtype", "f32"]
        subprocess.run([*command, "--outfile", str(gguf)], check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
        server = Server(options.server, gguf, options.port)
        try:
            for prompt in PROMPTS:
                ids = tokenizer.encode(prompt)
                theirs = server.post(
                    "/completion", prompt=ids, n_predict=options.tokens, temperature=0, top_k=1, return_tokens=True,
                    cache_prompt=False, ignore_eos=True,
                )["tokens"]  # fmt: skip
                ours = list(engine.generate([ids], params)[0].output_ids)
                same_prompt = server.post("/tokenize", content=prompt)["tokens"] == ids
                results.append({"prompt": prompt, "same_tokens": ours == theirs, "same_tokenisation": same_prompt})
                print(f"{prompt!r:<60} tokens {'equal' if ours == theirs else f'{ours} != {theirs}'}")
        finally:
            server.close()
    agree = all(result["same_tokens"] and result["same_tokenisation"] for result in results)
    print_json({"benchmark": "check_llama_cpp", "tokens": options.tokens, "agree": agree, "results": results})
    sys.exit(not agree)


if __name__ == "__main__":
    main()
