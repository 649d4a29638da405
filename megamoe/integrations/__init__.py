"""megamoe inside other libraries. A module here needs the library it is named after; importing megamoe needs none."""
