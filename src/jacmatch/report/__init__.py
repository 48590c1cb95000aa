"""Reports: tables, figures and HTML pages, made from run folders alone."""

from jacmatch.report.page import write_report
from jacmatch.report.tables import Table

__all__ = ["Table", "write_report"]
