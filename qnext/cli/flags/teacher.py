"""The flags of distillation that say whom a student learns from, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qnext.cli.flags.values import panel
from qnext.errors import UsageError

_teacher = panel("Teacher")


@dataclass(frozen=True)
class TeacherFlags:
    """A model of the student's vocabulary, and what it is asked about."""

    teacher: Annotated[
        str | None, _teacher("Whom the student learns from: of its vocabulary, any size and form.", metavar="MODEL")
    ] = None
    on_policy: Annotated[
        bool,
        _teacher(
            "The student writes the answers itself; the teacher corrects them.", "--on-policy", show_default=False
        ),
    ] = False

    @property
    def method(self) -> str:
        return "on-policy" if self.on_policy else "distill"

    def settings(self, *, resume: bool) -> list[str]:
        """What they say as settings of a task. Raises UsageError where the run in the folder says it already."""
        from qnext.recipes.tasks import whole_path

        if resume and (self.teacher is not None or self.on_policy):
            raise UsageError("--resume takes --teacher and --on-policy from the run in the folder")
        return [] if self.teacher is None else [f"teacher={whole_path(self.teacher)}"]
