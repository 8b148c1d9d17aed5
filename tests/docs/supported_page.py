"""Makes docs/guide/supported.md of the program's tables: `python -m tests.docs.supported_page` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

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
from qnext.quant.scheme import SCHEMES
from qnext.server.table import public_routes
from qnext.text.template_files import TEMPLATE_FILES
from qnext.text.tokenizer_files import READ_FORMS, UNREAD_FORMS

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "supported.md"


def page() -> str:
    """The whole page."""
    return "\n".join([*_models(), *_config(), *_folders(), *_quantised(), *_text(), *_gguf(), *_written(), *_served()])


def _models() -> list[str]:
    families = [f"| `{name}` | {family.title} | `{family.architecture}` |" for name, family in FAMILIES.items()]
    published = [name for name in published_models() if not name.endswith("-FP8")]
    return [
        "# What is read, written and served",
        "",
        "Everything is computed on the CPU, by native kernels for x86-64 or by PyTorch; a GPU is not used yet.",
        "What is not on this page ends with one line that names it: exit code 6 where a file is sound and of a",
        "form that is not supported, 5 where it is damaged or contradicts itself. `qnext verify FOLDER` reports",
        "everything at once, and `--strict` makes an error of each warning. This page is made from the program's",
        "tables by `python -m tests.docs.supported_page`.",
        "",
        "## Models",
        "",
        "| `model_type` | family | `architectures` |",
        "|---|---|---|",
        *families,
        "",
        f"Among the published models these are: {_list(published)}; most of them also with `-FP8` behind the name.",
        "Repackagings are read as far as this page goes. Text towers of wrappers (`text_config`, prefixes such as",
        "`model.language_model.`) are read where their `model_type` is one of these; towers for pictures and sound",
        "are passed over with a warning.",
        "",
    ]


def _config() -> list[str]:
    return [
        "## config.json",
        "",
        "- A key that is absent or null means what transformers takes for the family.",
        "- Tensors decide what the file leaves open, and the size of the vocabulary.",
        "- Keys that change no logit are accepted: "
        f"{len(keys.WITHOUT_EFFECT | frozenset(keys.UNUSED))} are known. All others are named once in a warning.",
        "- Keys of other architectures are accepted where their value says that nothing of it is there, and refused",
        f"  with key and value elsewhere: {_list(sorted(_neutral()))}.",
        f"- Positions: {_list(PLAIN_KINDS)} and `yarn`. Not {_list(OTHER_KINDS)}.",
        "- Attention over a window is refused where it is narrower than the context.",
        "- Multi-token prediction that is declared and not there, or there in part, is left out with a warning.",
        "",
    ]


def _neutral() -> set[str]:
    return {*keys.NEUTRAL, *keys.NEUTRAL_IN_HYBRID, *keys.NEUTRAL_ELSEWHERE}


def _folders() -> list[str]:
    foreign = [f"| `{pattern}` | {what} | {advice} |" for pattern, (what, advice) in FOREIGN_FILES.items()]
    return [
        "## Folders",
        "",
        "`config.json` and `*.safetensors`, one file or shards, with an index or without, linked or not; BF16, F16",
        f"and F32, also mixed. Other dtypes of safetensors are not weights here: {_list(OTHER_DTYPES)}.",
        "",
        "| experts as | |",
        "|---|---|",
        *(f"| `{form}` | {text} |" for form, text in EXPERT_FORMS.items()),
        "",
        "A folder that holds something else is told what it is:",
        "",
        "| files | what they are | what helps |",
        "|---|---|---|",
        *foreign,
        "",
    ]


def _quantised() -> list[str]:
    layouts = [
        f"| {layout.text} | {'codes stay codes' if layout.kind == 'int' else 'numbers, bfloat16'} |"
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
        "Not read, by `quant_method`: " + "; ".join(f"`{method}` ({why})" for method, why in NOT_READ.items()) + ".",
        "",
    ]


def _text() -> list[str]:
    return [
        "## Tokenizers and chat templates",
        "",
        "| tokenizer | |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in READ_FORMS.items()),
        *(f"| `{name}` | {text}: not read |" for name, text in UNREAD_FORMS.items()),
        "",
        "| chat template | |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in TEMPLATE_FILES.items()),
        "",
        "Templates run in a limited process of their own; which arguments one reads is told by `GET /v1/models`",
        "([prompts.md](prompts.md)).",
        "",
    ]


def _gguf() -> list[str]:
    kept = ", ".join(f"{name} ({bits} bits)" for name, bits in KEPT_BITS.items())
    return [
        "## GGUF",
        "",
        "`qnext convert FILE.gguf OUT` makes a folder; a GGUF file is not run as it is.",
        "",
        f"- Architectures: {_pairs(GGUF_ARCHITECTURES)}.",
        f"- Versions {' and '.join(map(str, READ_VERSIONS))}, little-endian, one file or parts.",
        f"- Types: {_list(BLOCK_TYPES)}. Codes of {kept} are kept as they are, all others become numbers.",
        f"- Types that are not read: {'; '.join(REFUSED_TYPES.values())}.",
        f"- Files that hold no model: {_pairs(OTHER_FILES)}.",
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
        "[fields.md](fields.md) lists the fields, tools and schemas that are passed over or refused,",
        "[connect-an-editor.md](connect-an-editor.md) the clients, [limits.md](limits.md) what is bounded.",
        "Pictures, sound and files are not read: the models are text models.",
        "",
    ]


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _pairs(table: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}` ({text})" for name, text in table.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
