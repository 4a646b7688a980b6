"""What is known about an Ollama server's settings, with a doctor that compares it with what is there."""
