"""Flower strategies of FL-WB."""
