"""GGUF files by llama.cpp's own converter and quantizer, and the Modelfile with which Ollama serves them."""
