"""One adapter whose strength is a dial: +c raises one answer, −c the other."""
