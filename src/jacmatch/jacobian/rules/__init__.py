"""Derivative rules that replace PyTorch's own in passes with derivatives.

`op_replacements` is the one mechanism: it decides which call is replaced. Every other module holds the rules of one
kind of operation.
"""
