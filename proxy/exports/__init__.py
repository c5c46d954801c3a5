"""What providers, and LiteLLM, say that requests cost: their exports, read a record at a time."""

from proxy.exports.formats import check_columns, read_export
from proxy.exports.lines import ExportError, Line

__all__ = ["ExportError", "Line", "check_columns", "read_export"]
