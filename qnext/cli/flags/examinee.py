"""Which model an evaluation asks: a folder, loaded here, or a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.flags.sampling import Device, DType, ExpertMemory, Yarn
from qnext.cli.flags.values import ApiKey, Url, human_int, panel
from qnext.errors import UsageError
from qnext.session.placement import AUTO

if TYPE_CHECKING:
    from qnext.eval.tasks import Examinee
    from qnext.session.llm import LLM

_asked = panel("Model")

AskedModel = Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder; or give --url.")]


def lengths_of(text: str, *, flag: str = "--lengths") -> list[int]:
    """
    >>> lengths_of("512,4K")
    [512, 4096]
    """
    try:
        return sorted({human_int(each) for each in text.split(",")})
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def places_of(count: int) -> list[float]:
    """
    >>> places_of(3), places_of(1)
    ([0.0, 0.5, 1.0], [0.5])
    """
    return [0.5] if count == 1 else [number / (count - 1) for number in range(count)]


def words_of(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@dataclass(frozen=True)
class ExamineeFlags:
    """How the model is reached, or loaded."""

    url: Url = None
    api_key: ApiKey = None
    served_model_name: Annotated[str | None, _asked("Of the server's models; default: its first.", metavar="NAME")] = (
        None
    )
    max_num_seqs: Annotated[int, _asked("Questions at once.", min=1, metavar="N")] = 4
    max_model_len: Annotated[
        int | None, _asked("Tokens of a question and its answer at most.", parser=human_int, metavar="N")
    ] = None
    yarn: Yarn = None
    expert_memory: ExpertMemory = None
    dtype: DType = None
    device: Device = AUTO

    def check(self, model: str | None) -> None:
        if (model is None) == (self.url is None):
            raise UsageError("give either MODEL or --url")

    @contextmanager
    def open(self, model: str | None, *, thinks: bool | None = None) -> Iterator[Examinee]:
        """Raises UsageError as check, and what opening a folder or reaching a server raises."""
        self.check(model)
        if self.url is not None:
            from qnext.client.examinee import RemoteExaminee

            with RemoteExaminee(
                self.url, api_key=self.api_key, model=self.served_model_name, concurrency=self.max_num_seqs
            ) as remote:
                yield remote
            return
        from qnext.session.examinee import LocalExaminee

        with self.llm(model) as llm:
            yield LocalExaminee(llm, thinks=thinks)

    @contextmanager
    def llm(self, model: str | None) -> Iterator[LLM]:
        """The model of this process."""
        from qnext.session.llm import LLM

        options: dict[str, Any] = {"max_num_seqs": self.max_num_seqs, "max_model_len": self.max_model_len}
        options |= {"yarn": self.yarn, "expert_memory": self.expert_memory, "device": self.device}
        with LLM(str(model), dtype=self.dtype, **options) as llm:
            yield llm
