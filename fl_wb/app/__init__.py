"""What FL-WB's own Flower App is made of: its configuration, its networks, its results.

Imports everything below `fl_wb.server_app` and `fl_wb.client_app`, which run it.
"""
