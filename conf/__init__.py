"""The Hydra configuration groups of FL-WB, as package data (read by `fl_wb.app.config`)."""
