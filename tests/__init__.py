"""Tests of FL-WB."""
