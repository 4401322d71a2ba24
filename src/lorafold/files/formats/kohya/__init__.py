"""kohya-ss's and LyCORIS's files: what is in them (`reading`), and products (`products`)."""
