"""cfclip"""
