"""detr"""
