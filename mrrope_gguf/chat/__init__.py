"""`mrrope chat`: a long document and a model in a terminal, or one answer in a pipe.

options  the command line and llama.cpp's environment as one value
model    which file, and what its header says of its context
plan     how many tokens of context, and by which table
memory   whether that fits, and what would
run      all of it in order, up to the first word
once     one answer; loop, commands, prompt: a conversation
answer, markdown, region, bar, window   what is shown
"""
