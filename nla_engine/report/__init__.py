"""The report page: a store and the table of its round trip as one HTML file to read and share."""

from nla_engine.report.page import ReportSummary, Section, write_report

__all__ = ["ReportSummary", "Section", "write_report"]
