"""Reports: tables, figures and a page, made from run folders alone."""

from jacmatch.report.experiments import Document, Table
from jacmatch.report.page import write_report

__all__ = ["Document", "Table", "write_report"]
