"""Stored rows in, tables and one self-contained page out."""

from expunge.report.latex import latex_table
from expunge.report.page import write_page
from expunge.report.summaries import Summary, summarise
from expunge.report.tables import Table, comparison, tables
from expunge.report.text import markdown, markdown_table, rich_tables, write_table

__all__ = [
    "Summary",
    "Table",
    "comparison",
    "latex_table",
    "markdown",
    "markdown_table",
    "rich_tables",
    "summarise",
    "tables",
    "write_page",
    "write_table",
]
