"""What the commands of `llmga` do, by what they are about; `llmga.cli` puts them together."""
