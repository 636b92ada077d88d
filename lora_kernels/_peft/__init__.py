"""PEFT's layers as they are when fused; importing a module of this folder imports PEFT."""
