"""How the embedded networks were trained: ``cfclip toonfaces train NAME``."""
