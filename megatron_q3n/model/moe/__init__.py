"""Mixture of experts: router, token dispatcher, routed and shared experts, routing replay."""
