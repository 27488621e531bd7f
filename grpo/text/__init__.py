"""Text alone: words of reflection, thought or answer. Imports nothing else of this package."""
