"""Latency of the networks side by side, and what a deployment costs; results/ holds what was measured."""
