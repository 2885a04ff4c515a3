"""Structured logs: JSON lines where a program or a file takes them, readable ones on a terminal."""

import logging
import sys

import structlog


def configure_logs() -> None:
    """Send everything that is logged to standard error, with time and level."""
    renderer: structlog.types.Processor
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def configure_command_logs() -> None:
    """A command tells its user what it did and what went wrong in its own words, in one line."""
    configure_logs()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
