/* For compilers without libFuzzer: runs a target with the files that are named as arguments. */
#include "fuzz.h"

int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        REQUIRE(file != NULL);
        const size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        char *copy = exact_copy(data, size);
        LLVMFuzzerTestOneInput((const uint8_t *)copy, size);
        free(copy);
    }
    printf("%d\n", argc - 1);
    return 0;
}
