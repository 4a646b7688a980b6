"""The fault kit: servers that fail as told, a network that lies, and what watches whether anybody notices."""
