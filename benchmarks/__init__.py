"""Commands that make the figures of the documents again."""
