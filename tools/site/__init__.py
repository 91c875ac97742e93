"""The site of the documentation: pages made from code and from files beside `docs/`, and the links between them."""
