"""Makes docs/guide/supported.md of the program's tables: `python -m tests.docs.supported_page` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qnext.checkpoint.adapters import NEUTRAL
from qnext.checkpoint.aliases import EXPERT_FORMS
from qnext.checkpoint.foreign import FOREIGN_FILES
from qnext.checkpoint.formats.forms import LAYOUTS, METHODS, NOT_READ
from qnext.checkpoint.gguf.block_types import BLOCK_TYPES, EXPORT_TYPES, KEPT_BITS, REFUSED_TYPES
from qnext.checkpoint.gguf.container import READ_VERSIONS
from qnext.checkpoint.gguf.read_keys import ARCHITECTURES as GGUF_ARCHITECTURES
from qnext.checkpoint.gguf.read_keys import OTHER_FILES
from qnext.checkpoint.header import OTHER_DTYPES
from qnext.checkpoint.nearby import published_models
from qnext.config import keys
from qnext.config.families import FAMILIES
from qnext.config.rope import OTHER_KINDS, PLAIN_KINDS
from qnext.lora.config import ADAPTABLE
from qnext.quant.scheme import SCHEMES
from qnext.server.table import public_routes
from qnext.text.template_files import TEMPLATE_FILES
from qnext.text.tokenizer_files import READ_FORMS, UNREAD_FORMS

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "supported.md"


def page() -> str:
    """The whole page."""
    parts = (_models, _config, _folders, _quantised, _text, _gguf, _adapters, _written, _served)
    return "\n".join(line for part in parts for line in part())


def _models() -> list[str]:
    families = [f"| `{name}` | {family.title} | `{family.architecture}` |" for name, family in FAMILIES.items()]
    published = [name for name in published_models() if not name.endswith("-FP8")]
    return [
        "# What is read, written and served",
        "",
        "qnext computes on the CPU, with native kernels for x86-64 or with PyTorch, and on NVIDIA GPUs",
        "([gpu.md](gpu.md)).",
        "",
        "A command that meets something that is not on this page ends with one line that names it. The exit code is 6",
        "for an undamaged file in a form that is not supported, and 5 for a file that is damaged or contradicts",
        "itself. `qnext verify FOLDER` reports all problems at once. `--strict` turns each warning into an error.",
        "`python -m tests.docs.supported_page` makes this page from the program's tables.",
        "",
        "## Models",
        "",
        "| `model_type` | family | `architectures` |",
        "|---|---|---|",
        *families,
        "",
        f"These published models belong to the families: {_list(published)}. Most of them also exist with `-FP8`",
        "behind the name.",
        "",
        "Repackaged models are read where their forms are on this page. The text model inside a multimodal model",
        "(`text_config`, prefixes such as `model.language_model.`) is read where its `model_type` is one of these. The",
        "parts for pictures and sound are ignored with a warning.",
        "",
    ]


def _config() -> list[str]:
    return [
        "## config.json",
        "",
        "- An absent key, or one that is null, means what transformers takes for the family.",
        "- The tensors decide what the file leaves open, and the size of the vocabulary.",
        "- Keys that change no logit are accepted: "
        f"{len(keys.WITHOUT_EFFECT | frozenset(keys.UNUSED))} are known. All others are named once in a warning.",
        "- Keys of other architectures are accepted where their value switches the feature off. Other values are",
        f"  refused, with key and value: {_list(sorted(_neutral()))}.",
        f"- Rotary positions of type {_list(PLAIN_KINDS)} and `yarn` are supported. Not",
        f"  supported: {_list(OTHER_KINDS)}.",
        "- Attention over a window is refused where the window is narrower than the context.",
        "- Multi-token prediction that is declared but absent or incomplete is left out with a warning.",
        "",
    ]


def _neutral() -> set[str]:
    return {*keys.NEUTRAL, *keys.NEUTRAL_IN_HYBRID, *keys.NEUTRAL_ELSEWHERE}


def _folders() -> list[str]:
    foreign = [f"| `{pattern}` | {what} | {advice} |" for pattern, (what, advice) in FOREIGN_FILES.items()]
    return [
        "## Folders",
        "",
        "A folder holds `config.json` and `*.safetensors`: one file or shards, with or without an index, as files or",
        "links. The dtypes are BF16, F16 and F32, also mixed. Other dtypes of safetensors are not read as weights:",
        f"{_list(OTHER_DTYPES)}.",
        "",
        "| layout of the experts | meaning |",
        "|---|---|",
        *(f"| `{form}` | {text} |" for form, text in EXPERT_FORMS.items()),
        "",
        "For a folder that holds something else, the error says what it holds and what helps:",
        "",
        "| files | what they are | what helps |",
        "|---|---|---|",
        *foreign,
        "",
    ]


def _quantised() -> list[str]:
    layouts = [
        f"| {layout.text} | {'codes stay codes' if layout.kind == 'int' else 'bfloat16 numbers'} |"
        for layout in LAYOUTS.values()
    ]
    return [
        "## Quantised folders",
        "",
        "| `quant_method` | what is read |",
        "|---|---|",
        *(f"| `{method}` | {text} |" for method, text in METHODS.items()),
        "",
        "| stored as | in memory |",
        "|---|---|",
        *layouts,
        "",
        "These values of `quant_method` are not read: "
        + "; ".join(f"`{method}` ({why})" for method, why in NOT_READ.items())
        + ".",
        "",
    ]


def _text() -> list[str]:
    return [
        "## Tokenizers and chat templates",
        "",
        "| tokenizer | content |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in READ_FORMS.items()),
        *(f"| `{name}` | {text}: not read |" for name, text in UNREAD_FORMS.items()),
        "",
        "| chat template | content |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in TEMPLATE_FILES.items()),
        "",
        "Templates run in a limited child process. `GET /v1/models` lists the arguments that a template reads",
        "([prompts.md](prompts.md)).",
        "",
    ]


def _gguf() -> list[str]:
    kept = ", ".join(f"{name} ({bits} bits)" for name, bits in KEPT_BITS.items())
    return [
        "## GGUF",
        "",
        "`qnext convert FILE.gguf OUT` makes a folder from a GGUF file. qnext does not run GGUF files directly.",
        "",
        f"- Architectures: {_pairs(GGUF_ARCHITECTURES)}.",
        f"- Versions {' and '.join(map(str, READ_VERSIONS))}, little-endian, as one file or split into parts.",
        f"- Types: {_list(BLOCK_TYPES)}. Codes of {kept} are kept. The other types become numbers.",
        f"- Types that are not read: {'; '.join(REFUSED_TYPES.values())}.",
        f"- Files that hold no model: {_pairs(OTHER_FILES)}.",
        "",
    ]


def _adapters() -> list[str]:
    return [
        "## Adapters",
        "",
        "Training writes LoRA adapters in PEFT's form, `adapter_config.json` beside `adapter_model.safetensors`. "
        "`qnext merge` merges them, and `qnext serve --lora NAME=FOLDER` serves them as they are.",
        "",
        f"- Matrices: {'; '.join(sorted(kind.value for kind in ADAPTABLE))}.",
        "- Experts: all of a layer in one pair of factors (`target_parameters`, as with transformers 5), or a pair for "
        "each projection of each expert, as with transformers 4.",
        f"- Refused where they are set: {_list(NEUTRAL)}.",
        "- The layer of multi-token prediction: in the same file, under `mtp.`. transformers has no such layer.",
        "- Merging keeps the form of every weight: bf16, fp16, fp32, FP8 with any scales, and integers of 4 or 8 bits, "
        "symmetric, as compressed-tensors. A changed weight that was quantised is rounded again.",
        "",
    ]


def _written() -> list[str]:
    return [
        "## Written",
        "",
        "- `qnext train`, `init` and `convert`: folders that transformers reads, in safetensors.",
        f"- `qnext quantize --scheme`: {_list(SCHEMES)}, as compressed-tensors, which transformers reads.",
        f"- `qnext convert --type`: GGUF in {_list(EXPORT_TYPES)}.",
        "",
    ]


def _served() -> list[str]:
    routes = [f"`{route.method} {route.path}`" for route in public_routes() if not route.path.startswith("/page")]
    return [
        "## Served",
        "",
        f"{', '.join(routes)}.",
        "",
        "[fields.md](fields.md) lists the fields, tools and schemas that are ignored or refused.",
        "[connect-an-editor.md](connect-an-editor.md) lists the clients, and [limits.md](limits.md) the limits.",
        "Pictures, sound and files are not read, because the models are text models.",
        "",
    ]


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _pairs(table: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}` ({text})" for name, text in table.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
