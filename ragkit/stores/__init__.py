"""What indexers build and retrievers search: documents, BM25 postings, embeddings."""
