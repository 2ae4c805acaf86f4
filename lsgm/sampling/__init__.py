"""Drawing from models: samplers, codes and editing."""
