"""Output constraints to grammars: compiled in processes that can be stopped, and kept.

Legend: R rows, Y vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import llguidance

from qnext.engine.sampling.compiling import CompileLine, CompilerProcesses, CompilersBusy, Job
from qnext.engine.sampling.constraint import Constraint, GrammarLimits, request_of
from qnext.engine.sampling.matchers import MatcherFactory
from qnext.engine.sampling.states import CompiledGrammar, GrammarState
from qnext.engine.sampling.vocabulary import Mask, Vocabulary
from qnext.errors import UsageError

__all__ = ["CompiledGrammar", "CompilersBusy", "GrammarCompiler", "GrammarState", "Mask", "Vocabulary"]

_PROGRAM = Path(__file__).with_name("grammar_worker.py")
_REFUSALS = 8  # kept for each grammar that is: they are one line each


@dataclass
class _Built:
    """A grammar that compiled. `held_bytes`: what its matcher takes of memory."""

    matcher: llguidance.LLMatcher
    held_bytes: int


@dataclass(eq=False)
class _Waiting:
    """Who waits for one constraint of one owner."""

    job: Job
    waiters: list[tuple[Constraint, Future[CompiledGrammar]]] = field(default_factory=list)


class GrammarCompiler:
    """Constraints to grammars, within limits, the last ones kept. For any number of threads.

    A constraint is compiled in a child process first, which is ended when that costs too much; `program` is run there.
    What passed is compiled again here, at no more than the same cost, in a thread, with the interpreter lock free.
    Refusals are remembered like what compiled, but not those of a busy machine. `close` ends all processes; else they
    end with the compiler.
    """

    def __init__(
        self, vocabulary: Vocabulary, limits: GrammarLimits | None = None, *, program: Path = _PROGRAM
    ) -> None:
        self.vocabulary = vocabulary
        self.limits = limits or GrammarLimits()
        self._line = CompileLine(self.limits)
        self._processes = CompilerProcesses(program, self.limits, self._setup)
        self._lock = threading.Lock()
        self._building = threading.Lock()  # one at a time: what compiling takes of memory is taken once
        self._built: OrderedDict[bytes, _Built] = OrderedDict()  # by digest of the constraint
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._held_bytes = 0
        self._waiting: dict[tuple[str, bytes], _Waiting] = {}

    def compile(self, constraint: Constraint, *, owner: str = "") -> CompiledGrammar:
        """Waits for `submit`. Raises UsageError, in one line, for a constraint that is malformed, impossible, too
        large or too costly, and CompilersBusy for one that could not be compiled now."""
        future = self.submit(constraint, owner=owner)
        try:
            return future.result(self.limits.wait_seconds)
        except FutureTimeoutError:
            future.cancel()
            raise CompilersBusy("the machine is too busy to compile output constraints") from None

    def submit(self, constraint: Constraint, *, owner: str = "") -> Future[CompiledGrammar]:
        """The grammar to come, or what `compile` raises. Owners have their turns and parts; a future that is
        cancelled in time costs nothing. Raises the same at once for what is known without compiling."""
        starts_after = constraint.starts_after
        if starts_after and not all(0 <= token < self.vocabulary.size for token in starts_after):
            raise UsageError("starts_after: not a token id of this model")
        request = request_of(constraint, self.limits)
        try:
            digest = hashlib.sha256(json.dumps(request).encode("ascii")).digest()
        except (TypeError, ValueError, RecursionError):
            raise UsageError(f"{constraint.kind}: not valid JSON") from None
        future: Future[CompiledGrammar] = Future()
        built: _Built | None = None
        job: Job | None = None
        with self._lock:
            if digest in self._refused:
                self._refused.move_to_end(digest)
                raise UsageError(self._refused[digest])
            if digest in self._built:
                self._built.move_to_end(digest)
                built = self._built[digest]
            elif (owner, digest) in self._waiting:
                self._waiting[owner, digest].waiters.append((constraint, future))
            else:
                job = Job(owner, lambda: self._run(owner, digest, request))
                self._line.submit(job)
                self._waiting[owner, digest] = _Waiting(job, [(constraint, future)])
        if built is not None:
            future.set_result(self._grammar(built, constraint))
        else:
            future.add_done_callback(lambda done: self._forget(owner, digest, done))
        return future

    def warm(self) -> None:
        """Have a process and the library ready before a constraint comes. Takes a second for a large vocabulary."""
        self._processes.warm()
        with self._building:
            _ = self._factory

    def close(self) -> None:
        """End all processes. What waits, or comes later, raises CompilersBusy."""
        left = self._line.close()
        self._processes.close()
        for job in left:
            job.run()  # which finds that there are no more processes

    @property
    def num_processes(self) -> int:
        return self._processes.num_processes

    @cached_property
    def _factory(self) -> MatcherFactory:
        vocabulary = self.vocabulary
        return MatcherFactory(
            vocabulary.token_bytes, eos_ids=vocabulary.eos_ids, special_ids=vocabulary.special_ids, limits=self.limits
        )

    def _setup(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary.packed(), "limits": asdict(self.limits)}

    def _run(self, owner: str, digest: bytes, request: dict[str, Any]) -> None:
        """Compile, remember, and tell who waits."""
        found: _Built | Exception
        try:
            found = self._compiled(request)
            self._remember(digest, found)
        except UsageError as error:
            found = error
            self._remember(digest, str(error))
        except CompilersBusy as error:
            found = error
        except BaseException as error:  # nobody may wait for ever
            found = UsageError(f"the output constraint cannot be compiled: {type(error).__name__}")
        with self._lock:
            waiters = self._waiting.pop((owner, digest)).waiters if (owner, digest) in self._waiting else []
        for constraint, future in waiters:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if isinstance(found, Exception):
                    raise found
                future.set_result(self._grammar(found, constraint))
            except Exception as error:
                future.set_exception(error)

    def _compiled(self, request: dict[str, Any]) -> _Built:
        kind = "tools" if request["kind"] == "calls" else request["kind"]
        answer = self._processes.ask(request, kind=kind)
        if "refusal" in answer:
            raise UsageError(answer["refusal"])
        with self._building:
            return _Built(self._factory.build(answer["text"]), answer["held_bytes"])

    def _forget(self, owner: str, digest: bytes, future: Future[CompiledGrammar]) -> None:
        """A future that was cancelled: its constraint need not be compiled where nobody else waits for it."""
        if not future.cancelled():
            return
        with self._lock:
            entry = self._waiting.get((owner, digest))
            if entry is None:
                return
            entry.waiters = [waiter for waiter in entry.waiters if waiter[1] is not future]
            if not entry.waiters and self._line.withdraw(entry.job):
                del self._waiting[owner, digest]

    def _remember(self, digest: bytes, found: _Built | str) -> None:
        limits = self.limits
        with self._lock:
            if isinstance(found, str):
                self._refused[digest] = found
                while len(self._refused) > _REFUSALS * limits.max_cached_grammars:
                    self._refused.popitem(last=False)
                return
            former = self._built.pop(digest, None)
            self._held_bytes += found.held_bytes - (former.held_bytes if former else 0)
            self._built[digest] = found
            while len(self._built) > limits.max_cached_grammars or self._held_bytes > limits.max_cached_bytes:
                self._held_bytes -= self._built.popitem(last=False)[1].held_bytes

    def _grammar(self, built: _Built, constraint: Constraint) -> CompiledGrammar:
        opened_by = constraint.opened_by
        if opened_by is not None and self._can_begin_with(built.matcher, opened_by):
            return CompiledGrammar(built.matcher, self.vocabulary, self.limits, None)
        return CompiledGrammar(built.matcher, self.vocabulary, self.limits, constraint.starts_after, opened_by)

    def _can_begin_with(self, matcher: llguidance.LLMatcher, token_id: int) -> bool:
        """Whether an output of the grammar can begin with a special token, or with the text of its name."""
        name = self.vocabulary.token_bytes[token_id]
        spelled = [self.vocabulary.token_bytes.index(bytes([byte])) for byte in name]
        return any(matcher.deep_copy().validate_tokens(ids) == len(ids) for ids in ([token_id], spelled))
