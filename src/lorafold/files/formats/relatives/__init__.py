"""What other programs write under PEFT's names, and hold otherwise."""
