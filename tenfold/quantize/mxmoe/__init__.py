"""MxMoE (arXiv 2505.05799): experts whose linear blocks have different precisions, chosen for accuracy and speed."""
