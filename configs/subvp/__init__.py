"""Published configurations; see each module."""
