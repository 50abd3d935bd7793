"""Training: the corpus, the tokenizer, the lookup documents and the stream they make together."""
