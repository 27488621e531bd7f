"""What can be typed in a conversation besides questions."""

HELP = """/reset            forget the conversation
/system TEXT      set the system message of the chat template, and forget the conversation
/temperature T    0 takes the likeliest token
/help             these lines
/quit             or Ctrl-D; Ctrl-C stops an answer"""
