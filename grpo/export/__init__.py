"""A trained model as others run it: GGUF with an Ollama Modelfile, a plain folder, the hub, each with a model card."""
