"""Reports: tables, figures and a page, made from run folders alone."""

from jacmatch.report.experiments import Table
from jacmatch.report.page import write_report

__all__ = ["Table", "write_report"]
