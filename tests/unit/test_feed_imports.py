import functools

from tasks.feed_imports import folders_read_once


def test_every_folder_of_models_is_remembered_and_nothing_else_grows():
    plain = functools.lru_cache
    with folders_read_once():

        @functools.lru_cache
        def create_import_structure_from_path(path):
            return path

        @functools.lru_cache
        def other(path):
            return path

        @functools.lru_cache(maxsize=7)
        def sized(path):
            return path

    assert functools.lru_cache is plain
    for _ in range(2):
        for number in range(1000):
            for function in (create_import_structure_from_path, other, sized):
                function(number)
    assert create_import_structure_from_path.cache_info().misses == 1000
    assert other.cache_info().maxsize == 128
    assert sized.cache_info().maxsize == 7
