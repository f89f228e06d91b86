import expunge


def test_every_public_class_and_function_says_what_it_is():
    for name in expunge.__all__:
        public = getattr(expunge, name)
        if getattr(public, "__module__", "").startswith("expunge"):
            assert public.__doc__, name
