"""Questions about a folder of documents, made from their own structure, and answers with the place where they stood.

Nouns: `SourceDocument` has numbered lines; `DocQuestion` an answer and its places; `DocsPlan`, `DocsReport`. No torch.
A new kind of file is a reader in reading.py, a new kind of question a function of questions.py and a line of
`QUESTION_KINDS`.
"""

from __future__ import annotations

from qnext.eval.docs.questions import QUESTION_KINDS, DocQuestion, make_questions
from qnext.eval.docs.reading import SourceDocument, read_folder
from qnext.eval.docs.run import DocsPlan, DocsReport, run_docs

__all__ = [
    "QUESTION_KINDS",
    "DocQuestion",
    "DocsPlan",
    "DocsReport",
    "SourceDocument",
    "make_questions",
    "read_folder",
    "run_docs",
]
