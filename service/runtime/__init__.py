"""Batches of rows through onnxruntime: queue, scheduler, threads, sessions."""
