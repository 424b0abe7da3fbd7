"""Export of trained models as ONNX graphs with golden rows and manifest."""
