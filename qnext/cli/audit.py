"""`qnext audit FILE`, the short form of `qnext audit verify FILE`."""

from qnext.cli.audit_verify import command

__all__ = ["command"]
