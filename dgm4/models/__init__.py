"""The published form of every network: `Published`, its parameters under the released names."""
