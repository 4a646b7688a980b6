"""The demonstration: a RAG graph, its documents and questions, and what the cache did with them."""
