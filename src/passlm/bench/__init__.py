"""Measuring methods side by side: suites, methods, measurement, report."""
