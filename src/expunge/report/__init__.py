"""Stored rows in, tables and one self-contained page out."""

from expunge.report.page import write_page
from expunge.report.summaries import Summary, summarise
from expunge.report.tables import Table, markdown, rich_tables, tables

__all__ = ["Summary", "Table", "markdown", "rich_tables", "summarise", "tables", "write_page"]
